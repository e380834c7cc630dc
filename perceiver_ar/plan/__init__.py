"""`plan`: what a run would take on machines that are not there."""
