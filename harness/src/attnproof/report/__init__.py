"""What a run says: tables, texts, JSON and the HTML page."""
