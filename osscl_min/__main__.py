from osscl_min.cli import main

if __name__ == "__main__":
    main()
