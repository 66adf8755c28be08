"""What runs embferry in containers and on Kubernetes: image, compose file, chart."""
