"""The small model that `demo` names, so that the service draws on any machine."""
