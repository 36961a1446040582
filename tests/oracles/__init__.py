"""Independent implementations that tests compare against."""
