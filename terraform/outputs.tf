locals {
  prices = jsondecode(file("${path.module}/prices.json"))
  hourly = merge(local.prices.instances, var.hourly_prices)
  hourly_cost = {
    jump      = lookup(local.hourly, var.jump_type, 0)
    mlservers = var.ml_count * lookup(local.hourly, var.ml_type, 0)
    volumes   = (var.jump_gib + var.ml_count * var.root_gib) * local.prices.volume_gib_month / 730
    addresses = (1 + var.ml_count) * local.prices.public_ipv4
  }
}

output "hourly_cost" {
  description = "USD an hour while everything runs, an estimate that plan and apply show before they ask"
  value = format("about %.2f USD an hour: %s %.2f, %d x %s %.2f%s, volumes %.2f, addresses %.2f (prices.json; before tax and traffic)",
    sum(values(local.hourly_cost)), var.jump_type, local.hourly_cost.jump, var.ml_count, var.ml_type, local.hourly_cost.mlservers,
  var.spot ? " at most, as spot" : "", local.hourly_cost.volumes, local.hourly_cost.addresses)
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
  value       = var.efa ? aws_eip.efa[*].public_ip : aws_instance.mlserver[*].public_ip
}

locals { # as push.sh does
  identity = var.ssh_private_key == null ? "" : "-i '${pathexpand(var.ssh_private_key)}' "
}

output "attach" {
  description = "Look into the training, server by server; leave with Ctrl-a d"
  value       = [for ip in var.efa ? aws_eip.efa[*].public_ip : aws_instance.mlserver[*].public_ip : "ssh ${local.identity}-t ubuntu@${ip} screen -x ddptrain"]
}

output "fetch_results" {
  description = "Copy logs and checkpoints from the jump host"
  value       = "mkdir -p runs && rsync -az -e \"ssh ${local.identity}\" ubuntu@${aws_instance.jump.public_ip}:/srv/yolov9001/results/ runs/${var.name}/"
}

output "start_jump" {
  description = "Start the jump host again after it stopped itself; its address changes: terraform refresh shows the new one"
  value       = "aws ec2 start-instances --region ${var.region} --instance-ids ${aws_instance.jump.id}"
}
