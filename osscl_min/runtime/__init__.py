"""The ground: devices and processes, files, tables, plotting."""
