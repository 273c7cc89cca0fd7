"""Several models into one: align and average, barycenters, and repairs on data."""
