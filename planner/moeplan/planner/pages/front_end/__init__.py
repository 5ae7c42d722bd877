"""Files that a browser runs, of both pages, read as they are; README.md says what each is."""
