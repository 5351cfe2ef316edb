"""What an experiment costs on accelerators that are not here: programs compiled ahead of time, and a model beside them."""
