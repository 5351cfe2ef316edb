"""Forecasts of transfer: from a base, a teacher and the data, before a student is trained (`experiments.audit`)."""
