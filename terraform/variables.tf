variable "ssh_cidr" {
  description = "Network from which SSH is allowed, such as 203.0.113.7/32, at most a /16; null for the address that each apply comes from"
  type        = string
  default     = null
  validation {
    condition     = var.ssh_cidr == null || can(cidrhost(var.ssh_cidr, 0)) && try(tonumber(split("/", var.ssh_cidr)[1]) >= 16, false)
    error_message = "Give an IPv4 network of /16 or smaller, best your own address with /32; the machines are not opened to the world."
  }
}

variable "name" {
  description = "Name of the cluster, in every tag; two clusters of one account need two names"
  type        = string
  default     = "yolov9001"
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.name))
    error_message = "Use 2 to 31 lower-case letters, digits and hyphens."
  }
}

variable "region" {
  description = "AWS region; find_instance.py tells where the types are offered"
  type        = string
  default     = "us-east-1"
}

variable "availability_zone" {
  description = "Zone within the region; null for the first that offers both types"
  type        = string
  default     = null
}

variable "ssh_public_key" {
  description = "File with the public key that may log in"
  type        = string
  default     = "~/.ssh/id_ed25519.pub"
}

variable "ssh_private_key" {
  description = "File with its private key, which stays on your machine; null for the ssh agent or the default key"
  type        = string
  default     = null
}

variable "jump_type" {
  description = "Instance type of the jump host; what counts is its link"
  type        = string
  default     = "c8gn.8xlarge"
}

variable "ml_type" {
  description = "Instance type of all ML servers"
  type        = string
  default     = "g5.xlarge"
}

variable "ml_count" {
  description = "Number of ML servers; 0 prepares the jump host only"
  type        = number
  default     = 1
  validation {
    condition     = var.ml_count >= 0 && var.ml_count <= 64 && floor(var.ml_count) == var.ml_count
    error_message = "Give a whole number from 0 to 64."
  }
}

variable "data" {
  description = "'coco' is downloaded to the jump host, 'digits' is embedded; else a data set's folder or data.yaml, relative to the repository and in send_folders"
  type        = string
  default     = "coco"
  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9_./-]*$", var.data))
    error_message = "Use letters, digits and . _ - / only, relative to the repository."
  }
  validation {
    condition     = contains(["coco", "digits"], var.data) || anytrue([for folder in var.send_folders : startswith("${var.data}/", "${folder}/")])
    error_message = "${var.data} is not sent: name it, or a folder around it, in send_folders; or use coco or digits."
  }
}

variable "send_folders" {
  description = "Folders sent besides what git tracks, relative to the repository, such as runs/train to continue that run"
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for folder in var.send_folders : can(regex("^[A-Za-z0-9_][A-Za-z0-9_./-]*$", folder))])
    error_message = "Use letters, digits and . _ - / only, relative to the repository."
  }
}

variable "run" {
  description = "Name of the run; it goes on from runs/NAME where that was sent"
  type        = string
  default     = "train"
  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9_.-]*$", var.run))
    error_message = "Use letters, digits and . _ - only."
  }
}

variable "parameters" {
  description = "Parameters of the training, as after -p: { epochs = \"300\" }; batch_size and lr are chosen by the number of GPUs unless given here"
  type        = map(string)
  default     = {}
  validation {
    condition     = alltrue([for name, value in var.parameters : can(regex("^[a-z_]+$", name)) && can(regex("^[A-Za-z0-9_.+-]+$", value))])
    error_message = "Names are lower-case with _, values letters, digits and . _ + - only."
  }
}

variable "stall_minutes" {
  description = "An ML server ends when it wrote no checkpoint for this long, the jump host when nothing arrived; 0 keeps them until max_hours"
  type        = number
  default     = 60
  validation {
    condition     = var.stall_minutes == 0 || var.stall_minutes >= 15
    error_message = "Give 0 or at least 15 minutes."
  }
}

variable "max_hours" {
  description = "Whatever happens, training stops after this time with a checkpoint, and the machines end"
  type        = number
  default     = 24
  validation {
    condition     = var.max_hours >= 1 && var.max_hours <= 720 && floor(var.max_hours) == var.max_hours
    error_message = "Give whole hours from 1 to 720."
  }
}

variable "spot" {
  description = "Rent the ML servers as spot instances: cheaper, and AWS may take them away"
  type        = bool
  default     = false
}

variable "placement_group" {
  description = "Put the ML servers close together: a single flow gets 10 Gbit/s instead of 5, but AWS runs out of capacity sooner"
  type        = bool
  default     = false
}

variable "jump_gib" {
  description = "Root volume of the jump host; COCO needs 60 GiB: archives, images and blob"
  type        = number
  default     = 120
}

variable "root_gib" {
  description = "Root volume of an ML server; it holds the data set where memory and instance store are too small"
  type        = number
  default     = 150
}

variable "jump_ami" {
  description = "AMI of the jump host; null for the current Ubuntu 24.04"
  type        = string
  default     = null
}

variable "ml_ami" {
  description = "AMI of the ML servers; null for the current Deep Learning Base AMI on Ubuntu 24.04"
  type        = string
  default     = null
}

variable "hourly_prices" {
  description = "USD an hour by instance type, where prices.json lacks it or your region differs"
  type        = map(number)
  default     = {}
}
