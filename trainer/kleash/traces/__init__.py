"""What is done with recorded spans: reading, sums, a timeline for Perfetto, a picture."""
