"""What of the Helm charts is made from the services' own models."""
