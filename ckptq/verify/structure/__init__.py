"""What names, headers and config.json say: is all there, declared and shaped as it should be?"""
