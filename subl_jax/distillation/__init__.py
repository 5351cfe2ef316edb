"""Distillation of any supported teacher into any supported student, on the user's own conversations or prompts."""
