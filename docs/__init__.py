"""What users read beyond the README, and the script that writes the parts the code knows."""
