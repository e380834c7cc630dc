"""Faults put into small real jobs, which must end as if nothing had been."""
