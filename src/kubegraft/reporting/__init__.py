"""What people and machines read about a run: events, progress, HTML reports."""
