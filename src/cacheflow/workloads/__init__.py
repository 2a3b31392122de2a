"""What is asked of a server: traces from files, generated sessions, arrival times, and prompts of real text."""
