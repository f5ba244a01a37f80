terraform {
  required_version = ">= 1.9"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "5.100.0" # the one that was tried
    }
  }
}

provider "aws" {
  region      = var.region
  max_retries = 3 # AWS answers "no capacity" as a fault to try again: with the default of 25, for 50 minutes
  default_tags {
    tags = { Project = "yolov9001", Cluster = var.name }
  }
}
