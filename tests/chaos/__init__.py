"""Distillation on two processes that is disturbed at random moments, and must end as if it had not been."""
