# Phase 1: the jump host gets the repository, downloads the data set, and serves both to the ML servers

data "aws_ec2_instance_type" "jump" {
  instance_type = var.jump_type
}

data "aws_ssm_parameter" "jump_ami" {
  count = var.jump_ami == null ? 1 : 0
  name  = "/aws/service/canonical/ubuntu/server/24.04/stable/current/${contains(data.aws_ec2_instance_type.jump.supported_architectures, "arm64") ? "arm64" : "amd64"}/hvm/ebs-gp3/ami-id"
}

resource "aws_instance" "jump" {
  # checkov:skip=CKV_AWS_88: you reach it by SSH; the security group lets in only ssh_cidr
  # checkov:skip=CKV_AWS_126: one-minute metrics cost money and nobody looks at them for some hours
  ami                                  = var.jump_ami != null ? var.jump_ami : nonsensitive(data.aws_ssm_parameter.jump_ami[0].value)
  instance_type                        = var.jump_type
  subnet_id                            = aws_subnet.cluster.id
  private_ip                           = local.jump_address
  associate_public_ip_address          = true
  vpc_security_group_ids               = [aws_security_group.cluster.id]
  key_name                             = aws_key_pair.user.key_name
  iam_instance_profile                 = aws_iam_instance_profile.jump.name
  instance_initiated_shutdown_behavior = "stop" # it keeps the results
  ebs_optimized                        = true
  user_data                            = templatefile("${path.module}/cloud-init.yaml.tftpl", { limit_minutes = var.stall_minutes > 0 ? var.stall_minutes : 60 * var.max_hours, first_script = "", names = {} })
  tags                                 = { Name = "${var.name}-jump", Role = "jump" }
  metadata_options {
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
  root_block_device {
    encrypted   = true
    volume_type = "gp3"
    volume_size = var.jump_gib
    throughput  = local.throughput.jump
    iops        = local.iops.jump
  }
  lifecycle {
    ignore_changes = [ami, user_data] # no reason to lose the results
  }
}

# The one right of a machine: when all is silent, the jump host terminates ML servers that hang and cannot do it themselves
data "aws_iam_policy_document" "jump" {
  # checkov:skip=CKV_AWS_356: DescribeInstances cannot be limited to resources
  statement {
    actions   = ["ec2:DescribeInstances"]
    resources = ["*"]
  }
  statement {
    actions   = ["ec2:TerminateInstances"]
    resources = ["arn:aws:ec2:${var.region}:*:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "ec2:ResourceTag/Cluster"
      values   = [var.name]
    }
    condition {
      test     = "StringEquals"
      variable = "ec2:ResourceTag/Role"
      values   = ["mlserver"]
    }
  }
}

data "aws_iam_policy_document" "ec2" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "jump" {
  name_prefix        = "${var.name}-jump-"
  assume_role_policy = data.aws_iam_policy_document.ec2.json
}

resource "aws_iam_role_policy" "jump" {
  name   = "terminate-own-ml-servers"
  role   = aws_iam_role.jump.id
  policy = data.aws_iam_policy_document.jump.json
}

resource "aws_iam_instance_profile" "jump" {
  name_prefix = "${var.name}-jump-"
  role        = aws_iam_role.jump.name
}

locals {
  jump_names = merge(local.names, {
    NAME    = var.name
    REGION  = var.region
    NETWORK = local.subnet
    ADDRESS = local.jump_address
    FOLDERS = join(" ", var.send_folders)
  })
}

resource "terraform_data" "prep" {
  triggers_replace = [aws_instance.jump.id, aws_instance.jump.public_ip, local.jump_names] # a new address: it was started again
  depends_on = [
    aws_route_table_association.cluster,
    aws_vpc_security_group_ingress_rule.ssh,
    aws_vpc_security_group_egress_rule.web,
    aws_vpc_security_group_egress_rule.inside,
    aws_vpc_security_group_ingress_rule.inside,
    aws_iam_role_policy.jump,
  ]
  provisioner "local-exec" {
    command = "bash ${path.module}/scripts/push.sh ubuntu@${aws_instance.jump.public_ip} ${join(" ", var.send_folders)}"
    environment = {
      SSH   = local.ssh_jump
      NAMES = join("\n", [for name, value in local.jump_names : "${name}='${value}'"])
    }
  }
  lifecycle {
    precondition {
      condition     = !contains(["stopping", "stopped"], aws_instance.jump.instance_state)
      error_message = "The jump host is stopped, and ML servers would wait for it in vain. Start it first: terraform output -raw start_jump is the command."
    }
  }
}

# Nothing but a warning before the jump host and its volume go
resource "terraform_data" "results" {
  triggers_replace = aws_instance.jump.id
  depends_on       = [terraform_data.prep]
  input = {
    SSH    = local.ssh_jump
    HOST   = "ubuntu@${aws_instance.jump.public_ip}"
    FOLDER = "${path.module}/../runs/${var.name}"
  }
  provisioner "local-exec" {
    when        = destroy
    command     = "bash ${path.module}/scripts/unfetched.sh"
    environment = self.input
  }
}
