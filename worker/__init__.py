"""The GPU edge: it draws."""
