"""What all other packages use: devices, processes, files, settings, tables, plotting."""
