"""TPU VMs through gcloud: create, install this version, run on every worker, follow, resume after preemption, delete."""
