"""What a loaded artifact needs to run: states, the decode engine, and the Hugging Face seam."""
