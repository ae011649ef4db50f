"""The service under load, faults and nonsense for a long time; the suite runs a little of each."""
