// Publishes a chat request to Headrace by Kafka and prints the chunks of the answer, then its result.

import static java.nio.charset.StandardCharsets.UTF_8;

import java.io.ByteArrayOutputStream;
import java.security.KeyFactory;
import java.security.MessageDigest;
import java.security.PrivateKey;
import java.security.SecureRandom;
import java.security.Signature;
import java.security.spec.PKCS8EncodedKeySpec;
import java.time.Duration;
import java.time.Instant;
import java.time.temporal.ChronoUnit;
import java.util.Base64;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.TreeMap;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;

public final class Publish {
  static final String TOPIC = "inference.requests";

  /** A UUID of version 7 that ends with the app's tag. */
  static String newId(String app, long nowMs) throws Exception {
    int random = new SecureRandom().nextInt(1 << 26);
    String tag = sha256(("headrace-tenant:" + app).getBytes(UTF_8)).substring(0, 12);
    return String.format("%012x7%03x%04x%s", nowMs, random >> 14, 0x8000 | random & 0x3FFF, tag);
  }

  /** What is signed: netstrings of a fixed word, the topic, each header in order of its name, and the body's hash. */
  static byte[] canonical(String topic, Map<String, String> headers, byte[] body) throws Exception {
    ByteArrayOutputStream form = new ByteArrayOutputStream();
    netstring(form, "headrace-signature-1");
    netstring(form, topic);
    for (Map.Entry<String, String> header : new TreeMap<>(headers).entrySet()) {
      if (header.getKey().startsWith("ce_") || header.getKey().startsWith("hr-")) {
        netstring(form, header.getKey());
        netstring(form, header.getValue());
      }
    }
    netstring(form, sha256(body));
    return form.toByteArray();
  }

  static void netstring(ByteArrayOutputStream form, String text) {
    byte[] bytes = text.getBytes(UTF_8);
    form.writeBytes((bytes.length + ":").getBytes(UTF_8));
    form.writeBytes(bytes);
    form.write(',');
  }

  static String sha256(byte[] bytes) throws Exception {
    return HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(bytes));
  }

  /** The value of hr-signature; the key is its 32 bytes in base64, to which PKCS 8 adds a fixed head. */
  static String sign(String privateKey, byte[] form) throws Exception {
    byte[] head = HexFormat.of().parseHex("302e020100300506032b657004220420");
    ByteArrayOutputStream encoded = new ByteArrayOutputStream();
    encoded.writeBytes(head);
    encoded.writeBytes(Base64.getDecoder().decode(privateKey));
    PrivateKey key = KeyFactory.getInstance("Ed25519").generatePrivate(new PKCS8EncodedKeySpec(encoded.toByteArray()));
    Signature signature = Signature.getInstance("Ed25519");
    signature.initSign(key);
    signature.update(form);
    return Base64.getEncoder().encodeToString(signature.sign());
  }

  static Properties kafka() {
    Properties found = new Properties();
    found.put("bootstrap.servers", System.getenv().getOrDefault("KAFKA_BOOTSTRAP", "127.0.0.1:9092"));
    String user = System.getenv("KAFKA_USERNAME");
    if (user != null) {
      found.put("security.protocol", "SASL_SSL");
      found.put("sasl.mechanism", "SCRAM-SHA-512");
      found.put("sasl.jaas.config", "org.apache.kafka.common.security.scram.ScramLoginModule required username=\""
          + user + "\" password=\"" + System.getenv("KAFKA_PASSWORD") + "\";");
    }
    String ca = System.getenv("KAFKA_CA");
    if (ca != null) {
      found.put("ssl.truststore.type", "PEM");
      found.put("ssl.truststore.location", ca);
    }
    return found;
  }

  static String header(ConsumerRecord<byte[], byte[]> record, String name) {
    return new String(record.headers().lastHeader(name).value(), UTF_8);
  }

  static String quoted(String text) {
    return '"' + text.replace("\\", "\\\\").replace("\"", "\\\"").replace("\n", "\\n") + '"';
  }

  public static void main(String[] args) throws Exception {
    String app = System.getenv("HEADRACE_APP");
    byte[] body = ("{\"model\":" + quoted(args[0]) + ",\"messages\":[{\"role\":\"user\",\"content\":" + quoted(args[1])
        + "}]}").getBytes(UTF_8);
    long nowMs = System.currentTimeMillis();
    String id = newId(app, nowMs);
    Map<String, String> headers = new TreeMap<>();
    headers.put("ce_specversion", "1.0");
    headers.put("ce_id", id);
    headers.put("ce_type", "headrace.inference.request.v1");
    headers.put("ce_source", "/examples/java");
    headers.put("ce_time", Instant.ofEpochMilli(nowMs).truncatedTo(ChronoUnit.MILLIS).toString());
    headers.put("hr-tenant", app);
    headers.put("hr-key-id", System.getenv("HEADRACE_PUBLISHER"));
    headers.put("hr-stream", "true");
    headers.put("hr-signature", sign(System.getenv("HEADRACE_PRIVATE_KEY"), canonical(TOPIC, headers, body)));

    try (var answers = new KafkaConsumer<>(kafka(), new ByteArrayDeserializer(), new ByteArrayDeserializer());
        var producer = new KafkaProducer<>(kafka(), new ByteArraySerializer(), new ByteArraySerializer())) {
      List<TopicPartition> partitions = answers.partitionsFor("replies." + app).stream()
          .map(found -> new TopicPartition(found.topic(), found.partition())).toList();
      answers.assign(partitions);
      answers.seekToEnd(partitions);
      partitions.forEach(answers::position); // listen first: the answer must not come before

      ProducerRecord<byte[], byte[]> request = new ProducerRecord<>(TOPIC, id.getBytes(UTF_8), body);
      headers.forEach((name, value) -> request.headers().add(name, value.getBytes(UTF_8)));
      producer.send(request).get();

      int seen = 0;
      long until = System.nanoTime() + Duration.ofSeconds(60).toNanos();
      while (System.nanoTime() < until) {
        for (ConsumerRecord<byte[], byte[]> record : answers.poll(Duration.ofSeconds(1))) {
          if (record.key() == null || !id.equals(new String(record.key(), UTF_8))) {
            continue;
          }
          String value = new String(record.value(), UTF_8);
          if (header(record, "ce_type").equals("headrace.inference.result.v1")) {
            System.out.println(value);
            System.exit(header(record, "hr-status").equals("completed") ? 0 : 1);
          }
          int seq = Integer.parseInt(header(record, "hr-seq"));
          if (seq > seen) { // records may come twice
            seen = seq;
            System.out.println(value);
          }
        }
      }
    }
    System.err.println("no answer within 60 s");
    System.exit(1);
  }
}
