"""Many virtual hospitals in one process, by the services' own cores. Not here: the command line, pictures, files."""
