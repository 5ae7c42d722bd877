"""Pages: the report of a trace, and what the live page of a job shows. The front end is in `front_end/`."""
