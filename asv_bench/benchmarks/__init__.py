"""What asv follows over commits; `hwdbm bench` prints the same figures once, beside their floors."""
