"""The files that run embferry in containers and on Kubernetes: image, compose file, chart."""
