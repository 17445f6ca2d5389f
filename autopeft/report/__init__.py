"""What people read: the HTML page, the leaderboards, and the words that both share with the command line."""
