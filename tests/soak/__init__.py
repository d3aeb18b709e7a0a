"""The soak: one command, repeated by a supervisor through every kind of fault, must end as the run that nothing disturbed."""
