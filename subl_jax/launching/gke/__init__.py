"""Google Kubernetes Engine: a JobSet for TPU slices, GPU hosts or CPUs, the image, and the commands around them."""
