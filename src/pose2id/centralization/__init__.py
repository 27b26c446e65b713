"""The equations, on features."""
