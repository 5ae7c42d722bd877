"""What a browser runs: the files of both pages, read as they are; README.md says what each is."""
