"""Starting one run on several hosts: on this machine, under Slurm, on Cloud TPU, on Kubernetes."""
