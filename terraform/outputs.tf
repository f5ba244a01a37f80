locals {
  prices = jsondecode(file("${path.module}/prices.json"))
  hourly = merge(local.prices.instances, var.hourly_prices)
  count  = { jump = 1, ml = var.ml_count }
  gib    = { jump = var.jump_gib, ml = var.root_gib }
  volume_month = { for role, gib in local.gib : role => gib * local.prices.volume_gib_month +
    (local.throughput[role] - 125) * local.prices.volume_mbps_month + (local.iops[role] - 3000) * local.prices.volume_iops_month
  }
  hourly_cost = {
    jump      = lookup(local.hourly, var.jump_type, 0)
    mlservers = var.ml_count * lookup(local.hourly, var.ml_type, 0)
    volumes   = sum([for role, month in local.volume_month : local.count[role] * month / 730])
    addresses = (1 + var.ml_count) * local.prices.public_ipv4
  }
}

output "cost" {
  description = "USD an hour while everything runs, and the most it can come to: an estimate that plan and apply show before they ask"
  value = join("", [
    format("about %.2f USD an hour: %s %.2f, ", sum(values(local.hourly_cost)), var.jump_type, local.hourly_cost.jump),
    format("%d x %s %.2f%s, ", var.ml_count, var.ml_type, local.hourly_cost.mlservers, var.spot ? " at most, as spot" : ""),
    format("volumes %.2f, addresses %.2f; ", local.hourly_cost.volumes, local.hourly_cost.addresses),
    format("at most %.0f USD in %d hours, ", ceil(sum(values(local.hourly_cost)) * (var.max_hours + 1)), var.max_hours + 1),
    format("then %.0f a month until terraform destroy (prices.json; before tax and traffic)", ceil(local.volume_month.jump)),
  ])
  precondition {
    condition     = contains(keys(local.hourly), var.jump_type) && contains(keys(local.hourly), var.ml_type)
    error_message = "No price known for ${var.jump_type} or ${var.ml_type}: look it up and set hourly_prices = { \"${var.ml_type}\" = USD }."
  }
}

output "jump_public_ip" {
  description = "Public address of the jump host"
  value       = aws_instance.jump.public_ip
}

output "mlserver_public_ips" {
  description = "Public addresses of the ML servers"
  value       = aws_instance.mlserver[*].public_ip
}

locals { # a host key belongs to an instance, not to an address that AWS gives to somebody else next
  identity = var.ssh_private_key == null ? "" : "-i '${pathexpand(var.ssh_private_key)}' "
  ssh      = "ssh ${local.identity}-o HostKeyAlias=%s -o StrictHostKeyChecking=accept-new -o ConnectTimeout=10 -o ServerAliveInterval=30"
  ssh_jump = format(local.ssh, aws_instance.jump.id)
  attach = [for server in aws_instance.mlserver : # right after apply sshd, then the session need a while
    "${format(local.ssh, server.id)} -o ConnectionAttempts=60 -t ubuntu@${server.public_ip} 'until screen -x ddptrain; do tail -n 1 /srv/yolov9001/results/setup.log; sleep 5; done'"
  ]
}

output "ssh" {
  description = "Look into the training of the first server, as soon as it has begun; leave with Ctrl-a d"
  value       = try(local.attach[0], "${local.ssh_jump} ubuntu@${aws_instance.jump.public_ip}")
}

output "attach" {
  description = "The same, server by server"
  value       = local.attach
}

output "fetch_results" {
  description = "Copy logs and checkpoints from the jump host"
  value       = "mkdir -p runs && rsync -az -e \"${local.ssh_jump}\" ubuntu@${aws_instance.jump.public_ip}:/srv/yolov9001/results/ runs/${var.name}/"
}

output "start_jump" {
  description = "Start the jump host again after it stopped itself; its address changes: terraform refresh shows the new one"
  value       = "aws ec2 start-instances --region ${var.region} --instance-ids ${aws_instance.jump.id}"
}
