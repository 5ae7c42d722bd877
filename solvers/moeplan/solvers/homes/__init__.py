"""Homes of resident experts over link domains: slow, where the split within a domain is fast."""
