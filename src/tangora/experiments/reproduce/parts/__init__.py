"""What each experiment is made of: settings, sizes and stand-ins, which can be read without importing torch."""
