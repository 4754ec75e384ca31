"""What ranks are made of: threads of this process, or processes of their own."""
