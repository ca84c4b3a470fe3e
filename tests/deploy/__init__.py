"""What is deployed: images, compose files and manifests, checked without a container or a cluster."""
