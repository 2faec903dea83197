"""What every command is made of: its face, its flags, its text, its launcher."""
