# Counts, security and safe defaults, with the AWS provider mocked: terraform test

mock_provider "aws" {
  mock_data "aws_ec2_instance_type_offerings" {
    defaults = { locations = ["us-east-1b", "us-east-1a"] }
  }
  mock_data "aws_ec2_instance_type" {
    defaults = { supported_architectures = ["arm64"], default_vcpus = 32, ebs_performance_maximum_throughput = 437.5 }
  }
  mock_data "aws_servicequotas_service_quota" {
    defaults = { value = 96 }
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
    condition     = alltrue([for text in [aws_instance.jump.user_data, aws_instance.mlserver[0].user_data] : length(text) < 4096 && !strcontains(text, "PRIVATE KEY")])
    error_message = "user_data is small and holds no secret"
  }
  assert {
    condition     = [for text in [aws_instance.jump.user_data, aws_instance.mlserver[0].user_data] : regex("--on-active=(\\d+m)\", --timer-property=DefaultDependencies=no, --property=DefaultDependencies=no,", text)[0]] == ["60m", "10m"]
    error_message = "a machine to which no script comes ends, one with a GPU after ten minutes"
  }
  assert {
    condition     = strcontains(aws_instance.mlserver[0].user_data, "MAX_HOURS='24'") && terraform_data.prep.triggers_replace[2].MAX_HOURS == 24
    error_message = "both know when all must end"
  }
  assert {
    condition     = [for machine in [aws_instance.jump, aws_instance.mlserver[0]] : "${machine.root_block_device[0].throughput} ${machine.root_block_device[0].iops}"] == ["437 3000", "437 3000"]
    error_message = "disks as fast as the machine"
  }
  assert {
    condition     = strcontains(output.cost, "about 2.98 USD an hour") && strcontains(output.cost, "at most 75 USD in 25 hours, then 23 a month")
    error_message = "1.90 + 1.006 + (270 GiB x 0.08 + 2 x 312 MB/s x 0.04) / 730 + 2 x 0.005: ${output.cost}"
  }
  assert {
    condition     = length(aws_placement_group.ml) == 0 && length(aws_instance.mlserver[0].instance_market_options) == 0
    error_message = "a placement group and spot only on request"
  }
  assert {
    condition     = length(terraform_data.caller) == 0
    error_message = "nobody is asked for an address that was given"
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
    condition     = strcontains(aws_instance.jump.user_data, "--on-active=1440m")
    error_message = "where the watch is switched off, max_hours is left"
  }
}

run "close_together" {
  command = plan
  variables {
    placement_group = true
  }
  assert {
    condition     = aws_placement_group.ml[0].strategy == "cluster" && aws_instance.mlserver[0].placement_group == "yolov9001"
    error_message = "a placement group on request"
  }
}

run "fast_disks_have_a_limit" {
  command = plan
  override_data {
    target = data.aws_ec2_instance_type.jump
    values = { supported_architectures = ["arm64"], default_vcpus = 32, ebs_performance_maximum_throughput = 2500 }
  }
  override_data {
    target = data.aws_ec2_instance_type.ml
    values = { supported_architectures = ["x86_64"], default_vcpus = 4, ebs_performance_maximum_throughput = 60 }
  }
  assert {
    condition     = [for machine in [aws_instance.jump, aws_instance.mlserver[0]] : "${machine.root_block_device[0].throughput} ${machine.root_block_device[0].iops}"] == ["1000 4000", "125 3000"]
    error_message = "gp3 has 125 to 1000 MB/s"
  }
}

run "quota_too_small" {
  command = plan
  variables {
    ml_count = 4
  }
  expect_failures = [data.aws_servicequotas_service_quota.vcpus["L-DB2E81BA"]]
}

run "quota_of_spot" {
  command = plan
  variables {
    spot          = true
    ml_type       = "p4d.24xlarge"
    hourly_prices = { "p4d.24xlarge" = 22 }
  }
  assert {
    condition     = keys(data.aws_servicequotas_service_quota.vcpus) == ["L-1216C47A", "L-7212CCBC"]
    error_message = "spot has quotas of its own"
  }
}

run "quota_for_both" {
  command = plan
  variables {
    ml_type       = "c7i.8xlarge"
    ml_count      = 3
    hourly_prices = { "c7i.8xlarge" = 1 }
  }
  expect_failures = [data.aws_servicequotas_service_quota.vcpus["L-1216C47A"]]
}

run "own_address" {
  command = plan
  variables {
    ssh_cidr = null
  }
  assert {
    condition     = length(terraform_data.caller) == 1
    error_message = "the address of the caller is asked for"
  }
}

run "too_long" {
  command = plan
  variables {
    max_hours = 0
  }
  expect_failures = [var.max_hours]
}

run "data_that_are_not_sent" {
  command = plan
  variables {
    data = "datasets/mine"
  }
  expect_failures = [var.data]
}

run "data_inside_a_folder_that_is_sent" {
  command = plan
  variables {
    data         = "datasets/mine/data.yaml"
    send_folders = ["datasets/mine"]
  }
  assert {
    condition     = terraform_data.prep.triggers_replace[2].FOLDERS == "datasets/mine"
    error_message = "prep is told which folders are data"
  }
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
  expect_failures = [output.cost]
}

run "known_price" {
  command = plan
  variables {
    ml_type       = "p9.giant"
    hourly_prices = { "p9.giant" = 100 }
  }
  assert {
    condition     = strcontains(output.cost, "1 x p9.giant 100.00")
    error_message = output.cost
  }
}
