// Publishes a chat request to Headrace by Kafka and prints the streamed answer.
//
//	HEADRACE_APP=shop HEADRACE_PUBLISHER=orders-1 HEADRACE_PRIVATE_KEY=<base64> go run . smollm2 Hello
package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl/scram"
)

const topic = "inference.requests"

func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// newID makes a UUID of version 7 that ends with the app's tag.
func newID(app string, now time.Time) string {
	var raw [4]byte
	if _, err := rand.Read(raw[:]); err != nil {
		log.Fatal(err)
	}
	random := binary.BigEndian.Uint32(raw[:]) >> 6
	tag := hash([]byte("headrace-tenant:" + app))[:12]
	return fmt.Sprintf("%012x7%03x%04x%s", now.UnixMilli(), random>>14, 0x8000|random&0x3FFF, tag)
}

// canonical is what is signed: netstrings of a fixed word, the topic, each header in order of its name, and the body's
// hash.
func canonical(topic string, headers map[string]string, body []byte) []byte {
	var names []string
	for name := range headers {
		if strings.HasPrefix(name, "ce_") || strings.HasPrefix(name, "hr-") {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	parts := []string{"headrace-signature-1", topic}
	for _, name := range names {
		parts = append(parts, name, headers[name])
	}
	var form bytes.Buffer
	for _, part := range append(parts, hash(body)) {
		fmt.Fprintf(&form, "%d:%s,", len(part), part)
	}
	return form.Bytes()
}

// sign gives the value of hr-signature.
func sign(privateKey string, form []byte) string {
	seed, err := base64.StdEncoding.DecodeString(privateKey)
	if err != nil {
		log.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(ed25519.Sign(ed25519.NewKeyFromSeed(seed), form))
}

func kafka() []kgo.Opt {
	bootstrap := os.Getenv("KAFKA_BOOTSTRAP")
	if bootstrap == "" {
		bootstrap = "127.0.0.1:9092"
	}
	found := []kgo.Opt{kgo.SeedBrokers(strings.Split(bootstrap, ",")...)}
	if user := os.Getenv("KAFKA_USERNAME"); user != "" {
		login := scram.Auth{User: user, Pass: os.Getenv("KAFKA_PASSWORD")}
		found = append(found, kgo.SASL(login.AsSha512Mechanism()), kgo.DialTLSConfig(trust()))
	}
	return found
}

// trust is how brokers are known: by KAFKA_CA, a PEM of those who may sign their certificates, else as the machine does.
func trust() *tls.Config {
	path := os.Getenv("KAFKA_CA")
	if path == "" {
		return &tls.Config{}
	}
	pem, err := os.ReadFile(path)
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		log.Fatalf("%s holds no certificate", path)
	}
	return &tls.Config{RootCAs: roots}
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	app := os.Getenv("HEADRACE_APP")
	answers := "replies." + app
	client, err := kgo.NewClient(kafka()...)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	// Listen first: the answer must not come before.
	ends, err := kadm.NewClient(client).ListEndOffsets(ctx, answers)
	if err != nil {
		log.Fatal(err)
	}
	client.AddConsumePartitions(ends.KOffsets())

	body, _ := json.Marshal(map[string]any{
		"model":    os.Args[1],
		"messages": []map[string]string{{"role": "user", "content": os.Args[2]}},
	})
	now := time.Now().UTC()
	id := newID(app, now)
	headers := map[string]string{
		"ce_specversion": "1.0",
		"ce_id":          id,
		"ce_type":        "headrace.inference.request.v1",
		"ce_source":      "/examples/go",
		"ce_time":        now.Format("2006-01-02T15:04:05.000Z07:00"),
		"hr-tenant":      app,
		"hr-key-id":      os.Getenv("HEADRACE_PUBLISHER"),
		"hr-stream":      "true",
	}
	headers["hr-signature"] = sign(os.Getenv("HEADRACE_PRIVATE_KEY"), canonical(topic, headers, body))
	request := &kgo.Record{Topic: topic, Key: []byte(id), Value: body}
	for name, value := range headers {
		request.Headers = append(request.Headers, kgo.RecordHeader{Key: name, Value: []byte(value)})
	}
	if err := client.ProduceSync(ctx, request).FirstErr(); err != nil {
		log.Fatal(err)
	}

	seen := 0
	for {
		fetches := client.PollFetches(ctx)
		if err := fetches.Err0(); err != nil {
			log.Fatal(err)
		}
		for _, record := range fetches.Records() {
			if string(record.Key) != id {
				continue
			}
			told := map[string]string{}
			for _, header := range record.Headers {
				told[header.Key] = string(header.Value)
			}
			if told["ce_type"] == "headrace.inference.result.v1" {
				fmt.Printf("\n%s\n", record.Value)
				if told["hr-status"] != "completed" {
					os.Exit(1)
				}
				return
			}
			var chunk struct {
				Choices []struct{ Delta struct{ Content string } }
			}
			if err := json.Unmarshal(record.Value, &chunk); err != nil {
				log.Fatal(err)
			}
			if seq, _ := strconv.Atoi(told["hr-seq"]); seq > seen { // records may come twice
				seen = seq
				fmt.Print(chunk.Choices[0].Delta.Content)
			}
		}
	}
}
