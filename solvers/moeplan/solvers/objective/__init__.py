"""The one place that turns loads into the number that plans are compared by."""
