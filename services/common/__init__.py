"""What the services share: a closed list of layered children."""
