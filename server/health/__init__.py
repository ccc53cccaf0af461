"""Whether the deployment works, told to orchestrators and to Prometheus."""
