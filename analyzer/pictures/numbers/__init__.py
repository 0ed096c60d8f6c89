"""What each picture shows, as plain numbers: for the drawings here, and for any other page. No matplotlib."""
