# AWS limits the vCPUs of an account by family. Asked at plan, so that a refusal does not come after prep was paid

locals {
  quotas = jsondecode(file("${path.module}/quotas.json"))
  market = { jump = "on_demand", ml = var.spot ? "spot" : "on_demand" }
  family = { jump = regex("^[a-z]*", var.jump_type), ml = regex("^[a-z]*", var.ml_type) }
  vcpus  = { jump = data.aws_ec2_instance_type.jump.default_vcpus, ml = var.ml_count * data.aws_ec2_instance_type.ml.default_vcpus }
  quota = { for role, family in local.family : role =>
  lookup(local.quotas[local.market[role]], family, local.quotas[local.market[role]].standard) }
}

data "aws_servicequotas_service_quota" "vcpus" {
  for_each     = toset(values(local.quota))
  service_code = "ec2"
  quota_code   = each.key
  lifecycle {
    postcondition {
      condition     = self.value >= sum([for role, code in local.quota : local.vcpus[role] if code == each.key])
      error_message = <<-END
        ${var.region} allows you ${self.value} vCPUs under quota ${each.key}, and this cluster needs ${sum([for role, code in local.quota : local.vcpus[role] if code == each.key])}. Ask for more, which may take AWS a day:
        aws service-quotas request-service-quota-increase --region ${var.region} --service-code ec2 --quota-code ${each.key} --desired-value ${sum([for role, code in local.quota : local.vcpus[role] if code == each.key])}
      END
    }
  }
}
