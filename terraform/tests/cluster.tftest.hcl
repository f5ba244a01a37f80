# Counts, security and safe defaults, with the AWS provider mocked: terraform test

mock_provider "aws" {
  mock_data "aws_ec2_instance_type_offerings" {
    defaults = { locations = ["us-east-1b", "us-east-1a"] }
  }
  mock_data "aws_ec2_instance_type" {
    defaults = { supported_architectures = ["arm64"], efa_supported = true }
  }
  mock_data "aws_iam_policy_document" {
    defaults = { json = "{}" }
  }
}

variables {
  ssh_cidr       = "203.0.113.7/32"
  ssh_public_key = "tests/user_key.pub"
}

run "defaults" {
  command = plan
  assert {
    condition     = aws_instance.jump.instance_type == "c8gn.8xlarge" && aws_instance.mlserver[0].instance_type == "g5.xlarge" && length(aws_instance.mlserver) == 1
    error_message = "one jump host and one ML server"
  }
  assert {
    condition     = aws_subnet.cluster.availability_zone == "us-east-1a"
    error_message = "the first zone that offers both"
  }
  assert {
    condition     = aws_vpc_security_group_ingress_rule.ssh.cidr_ipv4 == "203.0.113.7/32" && aws_vpc_security_group_ingress_rule.ssh.from_port == 22 && aws_vpc_security_group_ingress_rule.ssh.to_port == 22
    error_message = "SSH from the user only"
  }
  assert {
    condition     = aws_vpc_security_group_ingress_rule.inside.cidr_ipv4 == null && aws_vpc_security_group_egress_rule.inside.cidr_ipv4 == null
    error_message = "everything else from the group itself only"
  }
  assert {
    condition     = alltrue([for machine in concat([aws_instance.jump], aws_instance.mlserver) : machine.metadata_options[0].http_tokens == "required" && machine.root_block_device[0].encrypted])
    error_message = "IMDSv2 and encrypted volumes"
  }
  assert {
    condition     = aws_instance.jump.instance_initiated_shutdown_behavior == "stop" && aws_instance.mlserver[0].instance_initiated_shutdown_behavior == "terminate"
    error_message = "the jump host keeps the results, an ML server that ended costs nothing"
  }
  assert {
    condition     = alltrue([for text in [aws_instance.jump.user_data, aws_instance.mlserver[0].user_data] : length(text) < 4096 && strcontains(text, "\"--on-active=60m\", --timer-property=DefaultDependencies=no, --property=DefaultDependencies=no,") && !strcontains(text, "PRIVATE KEY")])
    error_message = "user_data is small, holds the time limit and no secret"
  }
  assert {
    condition     = strcontains(output.hourly_cost, "about 2.95 USD an hour")
    error_message = "1.90 + 1.006 + 270 GiB x 0.08 / 730 + 2 x 0.005: ${output.hourly_cost}"
  }
  assert {
    condition     = length(aws_placement_group.ml) == 1 && length(aws_network_interface.efa) == 0 && length(aws_instance.mlserver[0].instance_market_options) == 0
    error_message = "a placement group; spot and EFA only on request"
  }
}

run "many" {
  command = plan
  variables {
    ml_count      = 3
    spot          = true
    stall_minutes = 0
    parameters    = { epochs = "2", lr = "0.01" }
  }
  assert {
    condition     = length(aws_instance.mlserver) == 3 && alltrue([for server in aws_instance.mlserver : strcontains(server.user_data, "HOSTS='10.90.0.11,10.90.0.12,10.90.0.13'")])
    error_message = "every server is told all of them"
  }
  assert {
    condition     = [for server in aws_instance.mlserver : server.private_ip] == ["10.90.0.11", "10.90.0.12", "10.90.0.13"]
    error_message = "at the addresses it was told"
  }
  assert {
    condition     = strcontains(aws_instance.mlserver[2].user_data, "ADDRESS='10.90.0.13'") && strcontains(aws_instance.mlserver[2].user_data, "PARAMETERS='epochs=2 lr=0.01'")
    error_message = "its own address and the parameters"
  }
  assert {
    condition     = aws_instance.mlserver[0].instance_market_options[0].market_type == "spot" && strcontains(aws_instance.mlserver[0].user_data, "SPOT='true'")
    error_message = "spot"
  }
  assert {
    condition     = !strcontains(aws_instance.jump.user_data, "on-active")
    error_message = "no limit where it was switched off"
  }
}

run "efa" {
  command = plan
  variables {
    efa             = true
    ml_count        = 2
    placement_group = false
  }
  assert {
    condition     = length(aws_eip.efa) == 2 && [for card in aws_network_interface.efa : card.interface_type] == ["efa", "efa"] && length(aws_placement_group.ml) == 0
    error_message = "an EFA interface and an address each"
  }
}

run "efa_on_a_type_without_one" {
  command = plan
  variables {
    efa = true
  }
  override_data {
    target = data.aws_ec2_instance_type.ml
    values = { efa_supported = false }
  }
  expect_failures = [aws_network_interface.efa]
}

run "preparation_only" {
  command = plan
  variables {
    ml_count = 0
  }
  assert {
    condition     = length(aws_instance.mlserver) == 0 && output.mlserver_public_ips == []
    error_message = "no ML server"
  }
}

run "open_to_the_world" {
  command = plan
  variables {
    ssh_cidr = "0.0.0.0/0"
  }
  expect_failures = [var.ssh_cidr]
}

run "open_to_half_the_world" {
  command = plan
  variables {
    ssh_cidr = "0.0.0.0/1"
  }
  expect_failures = [var.ssh_cidr]
}

run "shell_in_a_parameter" {
  command = plan
  variables {
    parameters = { epochs = "2'; reboot" }
  }
  expect_failures = [var.parameters]
}

run "zone_that_lacks_a_type" {
  command = plan
  variables {
    availability_zone = "us-east-1e"
  }
  expect_failures = [aws_subnet.cluster]
}

run "unknown_price" {
  command = plan
  variables {
    ml_type = "p9.giant"
  }
  expect_failures = [output.hourly_cost]
}

run "known_price" {
  command = plan
  variables {
    ml_type       = "p9.giant"
    hourly_prices = { "p9.giant" = 100 }
  }
  assert {
    condition     = strcontains(output.hourly_cost, "1 x p9.giant 100.00")
    error_message = output.hourly_cost
  }
}
