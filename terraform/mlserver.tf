# Phase 2: ML servers, all at once and all of one type, only after prep has succeeded

locals {
  names = { # what the scripts on the machines are told
    ROOT          = "/srv/yolov9001"
    DATA          = var.data
    STALL_MINUTES = var.stall_minutes
    MAX_HOURS     = var.max_hours
    END           = "sudo systemctl poweroff"
  }
  # gp3 writes 125 MB/s unless more is paid: as much as the instance can take, at 4 IOPS a MB/s
  types      = { jump = data.aws_ec2_instance_type.jump, ml = data.aws_ec2_instance_type.ml }
  throughput = { for role, type in local.types : role => max(125, min(1000, floor(type.ebs_performance_maximum_throughput))) }
  iops       = { for role, megabytes in local.throughput : role => max(3000, 4 * megabytes) }
}

data "aws_ec2_instance_type" "ml" {
  instance_type = var.ml_type
}

data "aws_ssm_parameter" "ml_ami" {
  count = var.ml_ami == null ? 1 : 0
  name  = "/aws/service/deeplearning/ami/${contains(data.aws_ec2_instance_type.ml.supported_architectures, "arm64") ? "arm64" : "x86_64"}/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
}

resource "aws_placement_group" "ml" {
  count    = var.placement_group ? 1 : 0
  name     = var.name
  strategy = "cluster"
}

resource "aws_instance" "mlserver" {
  # checkov:skip=CKV_AWS_88: you reach it by SSH; the security group lets in only ssh_cidr
  # checkov:skip=CKV_AWS_126: one-minute metrics cost money and nobody looks at them for some hours
  # checkov:skip=CKV2_AWS_41: it needs no right in AWS, so it has no role
  count                                = var.ml_count
  ami                                  = var.ml_ami != null ? var.ml_ami : nonsensitive(data.aws_ssm_parameter.ml_ami[0].value)
  instance_type                        = var.ml_type
  subnet_id                            = aws_subnet.cluster.id
  private_ip                           = local.ml_addresses[count.index]
  associate_public_ip_address          = true
  vpc_security_group_ids               = [aws_security_group.cluster.id]
  key_name                             = aws_key_pair.user.key_name
  placement_group                      = var.placement_group ? aws_placement_group.ml[0].name : null
  instance_initiated_shutdown_behavior = "terminate" # a stopped one would still cost its volume
  ebs_optimized                        = true
  user_data = templatefile("${path.module}/cloud-init.yaml.tftpl", {
    limit_minutes = 10
    first_script  = "mlserver.sh"
    names = merge(local.names, {
      JUMP       = local.jump_address
      ADDRESS    = local.ml_addresses[count.index]
      HOSTS      = join(",", local.ml_addresses)
      OWNER      = "ubuntu"
      RUN        = var.run
      SPOT       = var.spot
      PARAMETERS = join(" ", [for name, value in var.parameters : "${name}=${value}"])
    })
  })
  user_data_replace_on_change = true
  tags                        = { Name = "${var.name}-ml${count.index}", Role = "mlserver" }
  dynamic "instance_market_options" {
    for_each = var.spot ? [1] : []
    content {
      market_type = "spot"
      spot_options {
        spot_instance_type             = "one-time"
        instance_interruption_behavior = "terminate"
      }
    }
  }
  metadata_options {
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
  root_block_device {
    encrypted   = true
    volume_type = "gp3"
    volume_size = var.root_gib
    throughput  = local.throughput.ml
    iops        = local.iops.ml
  }
  depends_on = [terraform_data.prep, terraform_data.results]
  lifecycle {
    ignore_changes       = [ami]
    replace_triggered_by = [terraform_data.prep] # new data or code: new servers
  }
}
