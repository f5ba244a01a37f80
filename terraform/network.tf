locals {
  subnet = "10.90.0.0/24"
  # addresses are known before any machine is, so that every ML server can be told all others
  jump_address = cidrhost(local.subnet, 10)
  ml_addresses = [for i in range(var.ml_count) : cidrhost(local.subnet, 11 + i)]
  zones        = sort(setintersection(data.aws_ec2_instance_type_offerings.jump.locations, data.aws_ec2_instance_type_offerings.ml.locations))
  zone         = var.availability_zone != null ? var.availability_zone : try(local.zones[0], "none")
}

data "aws_ec2_instance_type_offerings" "jump" {
  location_type = "availability-zone"
  filter {
    name   = "instance-type"
    values = [var.jump_type]
  }
}

data "aws_ec2_instance_type_offerings" "ml" {
  location_type = "availability-zone"
  filter {
    name   = "instance-type"
    values = [var.ml_type]
  }
}

# Your own address may change between two applies, so each asks for it
resource "terraform_data" "caller" {
  count            = var.ssh_cidr == null ? 1 : 0
  triggers_replace = plantimestamp()
  input            = "${path.module}/.caller"
  provisioner "local-exec" {
    command = "curl -fsS --retry 3 https://checkip.amazonaws.com >'${self.input}'"
  }
}

locals {
  ssh_cidr = var.ssh_cidr != null ? var.ssh_cidr : "${trimspace(file(terraform_data.caller[0].output))}/32"
}

resource "aws_vpc" "cluster" {
  # checkov:skip=CKV2_AWS_11: flow logs cost money and outlive a cluster of some hours
  cidr_block           = local.subnet
  enable_dns_hostnames = true
  tags                 = { Name = var.name }
}

resource "aws_default_security_group" "closed" {
  vpc_id = aws_vpc.cluster.id
}

resource "aws_subnet" "cluster" {
  vpc_id            = aws_vpc.cluster.id
  cidr_block        = local.subnet
  availability_zone = local.zone
  tags              = { Name = var.name }
  lifecycle {
    precondition {
      condition     = contains(local.zones, local.zone)
      error_message = "No zone for ${var.jump_type} and ${var.ml_type}: in ${var.region} both are offered in [${join(", ", local.zones)}]. Run: python find_instance.py ${var.jump_type} ${var.ml_type}"
    }
  }
}

resource "aws_internet_gateway" "cluster" {
  vpc_id = aws_vpc.cluster.id
  tags   = { Name = var.name }
}

resource "aws_route_table" "cluster" {
  vpc_id = aws_vpc.cluster.id
  tags   = { Name = var.name }
  route {
    cidr_block = "0.0.0.0/0"
    gateway_id = aws_internet_gateway.cluster.id
  }
}

resource "aws_route_table_association" "cluster" {
  subnet_id      = aws_subnet.cluster.id
  route_table_id = aws_route_table.cluster.id
}

resource "aws_security_group" "cluster" {
  name        = var.name
  description = "Machines of one training cluster"
  vpc_id      = aws_vpc.cluster.id
  tags        = { Name = var.name }
}

resource "aws_vpc_security_group_ingress_rule" "ssh" {
  security_group_id = aws_security_group.cluster.id
  description       = "SSH from the user only"
  cidr_ipv4         = local.ssh_cidr
  ip_protocol       = "tcp"
  from_port         = 22
  to_port           = 22
}

resource "aws_vpc_security_group_ingress_rule" "inside" {
  security_group_id            = aws_security_group.cluster.id
  description                  = "The machines among themselves: nginx, torchrun, NCCL"
  referenced_security_group_id = aws_security_group.cluster.id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_egress_rule" "inside" {
  security_group_id            = aws_security_group.cluster.id
  description                  = "The machines among themselves"
  referenced_security_group_id = aws_security_group.cluster.id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_egress_rule" "web" {
  for_each          = { http = 80, https = 443 }
  security_group_id = aws_security_group.cluster.id
  description       = "Packages and data sets by ${each.key}"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = each.value
  to_port           = each.value
}

resource "aws_key_pair" "user" {
  key_name   = var.name
  public_key = trimspace(file(pathexpand(var.ssh_public_key)))
}
